"""Tools behind the EmoSAE book: how language models infer emotions from text, and why some are harder."""

__version__ = "0.1.0"
