"""llama.cpp in this process: its library, a model with its contexts, and the dry run that reports their memory."""
