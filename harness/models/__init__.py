"""The small test models: recipes that build them from a seed, and nothing downloaded."""
