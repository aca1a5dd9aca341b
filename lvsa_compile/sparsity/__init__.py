"""What may attend to what: integers only, no graph and no kernel."""
