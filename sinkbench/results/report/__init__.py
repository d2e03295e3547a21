"""One page that shows results: figures, tables, settings, and what looks wrong.

Data flows one way: folders (:mod:`.collect`) are summarised (:mod:`.summary`), compared (:mod:`.comparing`) and
checked (:mod:`.warnings`); what is found is laid out as sections (:mod:`.sections`), which :mod:`.page` and
:mod:`.markdown` write down.
"""
