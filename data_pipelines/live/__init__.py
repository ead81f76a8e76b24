"""What is retrieved from while a text is generated: a database at a revision, several, or a file.

`database.LiveDatabase`, `several.SeveralDatabases` and `several.FixedNeighbours` implement the protocol
LiveDatabase of retro_jax.generate.live_database; `settings.LiveSettings` chooses one of them.
"""
