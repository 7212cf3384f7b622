"""What turns tokens into answers, the same for every engine: stop texts and streams."""
