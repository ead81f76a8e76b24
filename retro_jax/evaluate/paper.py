"""The paper's figures (arXiv 2112.04426 v3), to stand beside ours: other data, far larger models."""

# WikiText-103, perplexity by word: method and database, validation, test.
WIKITEXT103 = (
    ("baseline transformer", 21.53, 22.96),
    ("kNN-LM, Wikipedia", 18.52, 19.54),
    ("RETRO, Wikipedia", 18.46, 18.97),
    ("RETRO, C4", 12.87, 10.23),
    ("RETRO, MassiveText (all)", 3.21, 3.92),
)
WIKITEXT103_WORDS = {"validation": 217_646, "test": 245_569}

# The Pile, bits per byte: baseline of 7B and RETRO of 7.5B parameters.
PILE = {
    "arxiv": (0.742, 0.714),
    "books3": (0.792, 0.653),
    "dm_mathematics": (1.177, 1.164),
    "freelaw": (0.576, 0.499),
    "github": (0.420, 0.199),
    "gutenberg": (0.803, 0.400),
    "hackernews": (0.971, 0.860),
    "pile_cc": (0.771, 0.626),
    "pubmed_central": (0.588, 0.419),
    "stackexchange": (0.714, 0.624),
    "ubuntu_irc": (1.200, 1.178),
    "uspto": (0.603, 0.583),
}

# LAMBADA, accuracy of the last word, by size: baseline and RETRO.
LAMBADA = {"172m": (0.42, 0.52), "425m": (0.51, 0.60), "1.5b": (0.61, 0.67), "7.5b": (0.69, 0.73)}

# Ablations, bits per byte of C4 at 247M parameters, by the names of experiments/ablations: the ablated
# model, and the one that it is to be compared with. The paper's own default has embeddings apart, and
# CCA in one layer of the middle is its nearest to a small model with CCA in one layer.
ABLATIONS = {
    "chunk_only": (0.950, 0.822),
    "continuation_only": (0.895, 0.822),
    "no_query_conditioning": (0.829, 0.822),
    "no_cca_positions": (0.826, 0.822),
    "own_embeddings": (0.822, 0.823),
    "one_neighbour": (0.858, 0.822),
    "cca_first_layer": (0.827, 0.823),
    "cca_last_layer": (0.831, 0.823),
    "cca_every_layer": (0.860, 0.823),
}
