"""llmproxy: keys, routing by model, exact metering and a durable ledger, as one mitmproxy addon.

`hooks.Gateway` decides when, the modules below it decide what. Imports point one way: hooks may import everything,
nothing imports hooks.
"""
