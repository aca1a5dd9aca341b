"""How blocks of attention are chosen: a folder a policy, no graph and no kernel."""
