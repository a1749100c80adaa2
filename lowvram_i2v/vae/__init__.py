"""The causal video VAE: one image or a video to latents, latents to frames. `config` imports no torch.

    latents [16, T, h, w]  <->  video [3, 4 (T - 1) + 1, 8 h, 8 w], float32, about -1..1

No tensor has a batch axis. The caller multiplies or divides by `VaeConfig.scaling_factor`.
"""
