"""What a person at a terminal sees: answers as they come, the canvas while it is denoised, a conversation, a model."""
