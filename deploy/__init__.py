"""Everything that runs Stripwire somewhere."""
