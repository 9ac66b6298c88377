"""llmproxy: mitmdump -s addon/llmproxy.py [--set llmproxy_config=PATH]

mitmproxy reloads this file when it changes, but none of the package behind it: a change of code takes a restart.
"""

from gateway.hooks import Gateway

addons = [Gateway()]
