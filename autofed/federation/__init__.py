"""Who talks to whom: the loop (once), a site and its one door, and transports."""
