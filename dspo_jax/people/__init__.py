"""People's preferences: which images are shown together, the votes, the web page, what is exported."""
