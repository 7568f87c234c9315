"""Fine-tune the denoiser and the decoder on a few normal pictures."""
