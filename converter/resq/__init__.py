"""ResQ: directions of high variance stay in more bits (arXiv:2412.14363)."""
