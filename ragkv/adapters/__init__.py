"""ragkv inside other frameworks, an extra each: ``ragkv[langchain]``, say. Nothing here is imported before it is used."""
