"""One page that shows results: figures, tables, settings, and what looks wrong.

Data flows one way: folders (:mod:`.gathering`) are measured (:mod:`.measuring`), compared (:mod:`.comparing`) and
doubted (:mod:`.doubts`); what is found is laid out as sections (:mod:`.sections`), which :mod:`.page` and
:mod:`.markdown` write down.
"""
