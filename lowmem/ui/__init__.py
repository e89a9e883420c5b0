"""The web app. The only part of lowmem that imports gradio; it imports no torch."""
