"""How the shipped sparse autoencoder (SAE) is made: `python -m trimtab.attribution.training`, or `make sae`.

    sources → own samples → documents → activations → training → threshold → measurements → folder and card

Each stage leaves its result in the cache folder under a hash of what it depends on; a stopped run goes on where it was.
"""
