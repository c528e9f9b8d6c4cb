"""`attach` puts an intervention on a Hugging Face model, where it runs under torch's own hooks whoever calls the model, without nnsight.

_attach             `attach`: checks that the intervention can run on this model, and puts it there
_attachment         `Attachment`: the hooks on the model
_guarded_run        which forward passes belong together: a prompt and the decode steps of its answer
_inputs             the inputs of a forward pass as a `Batch`
"""

from guardlens.models.attachment._attach import attach
from guardlens.models.attachment._attachment import Attachment, require_uncompiled

__all__ = ["Attachment", "attach", "require_uncompiled"]
