"""Vector indexes over the catalogue: an exact oracle and LanceDB."""
