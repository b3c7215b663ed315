"""From text files to the token chunks that an encoder sees."""
