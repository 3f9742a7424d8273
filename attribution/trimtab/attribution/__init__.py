"""Attribution: from pairs of completions to the latents that cause a behaviour, written into a bundle."""
