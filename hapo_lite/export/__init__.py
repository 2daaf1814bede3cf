"""`python -m hapo_lite.export`: a run as a merged model, as one for llama.cpp, or as an adapter with its papers."""
