"""Policies: training in the dream, scripted policies, scoring in the real game, commands."""

if __name__ != "worldgym.agents":
    raise ImportError("import worldgym.agents, not agents")
