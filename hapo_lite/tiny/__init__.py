"""The bundled model, its task, and the script that makes them."""
