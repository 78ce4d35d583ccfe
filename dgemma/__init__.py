"""dgemma: run, serve, edit with, constrain, fine-tune and study DiffusionGemma."""
