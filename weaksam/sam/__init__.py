"""SAM as a batch engine: encode an image once, decode thousands of prompts, keep few masks."""
