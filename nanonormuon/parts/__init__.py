"""What model.py is assembled from by choice: its settings, experts, latent attention."""
