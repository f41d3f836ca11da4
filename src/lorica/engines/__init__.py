"""The libraries that cut models, each recognised and described as layouts."""
