"""Everything that touches a Hugging Face module: architectures, prompt processing, the engine, and the hooked model on top of them."""
