"""The transport between machines: Flower carries the bytes, with its own identities, encryption and reconnecting.

The only room that imports Flower. At the coordinator the loop asks through `OverFlower`; at a site a SuperNode fetches
the messages, and `answers` hands their bytes to the site's `Premises`. No strategy of Flower's is used: what is asked,
checked and merged is the same as on one machine.
"""
