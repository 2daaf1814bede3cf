"""`python -m hapo_lite.export` writes a run as a merged model, a model for llama.cpp, or an adapter with its card."""
