"""The arms that ours is measured against, each with its fair best."""
