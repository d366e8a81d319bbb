"""What a site takes on a target, each way to compute it, and which way to choose."""
