"""The report of a bundle: one self-contained HTML file, and the same as JSON, for a person who was not there.

document   what the report says, as JSON: from the bundle, the trial's result, the SAE's examples, the model's own
examples   where a latent fires: on the SAE's text, and token by token on the pairs
plots      figures as SVG
page       the HTML
"""
