"""Export to diffusers, model card, and upload to the Hub."""
