"""What an answer must look like: a schema, a regular expression, choices or a grammar, made into an automaton."""
