"""Long Video Sparse Attention (LVSA, arXiv 2605.31057): integers only."""
