"""How everything that is committed was made: run as `python -m recipes.FOLDER.FILE` from the root of a checkout."""
