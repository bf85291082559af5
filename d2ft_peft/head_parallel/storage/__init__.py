"""How a model that is cut over ranks is loaded, saved and resumed."""
