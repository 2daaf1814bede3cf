"""A finished run as something to pass on: a merged model, the same for llama.cpp, or the adapter with its papers."""
