"""What a recipe needs of memory and time on given GPUs, computed from shapes alone: no weights, no GPU."""
