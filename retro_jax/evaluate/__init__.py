"""How well a model predicts a text: scores of tokens, figures per corpus, the report."""
