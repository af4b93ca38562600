from ragkv.chunk import Chunk as Chunk
from ragkv.chunk import ChunkKV as ChunkKV
from ragkv.engine import Engine as Engine
from ragkv.errors import DocumentError as DocumentError
from ragkv.errors import IncompatibleFolderError as IncompatibleFolderError
from ragkv.errors import MethodError as MethodError
from ragkv.errors import PromptError as PromptError
from ragkv.errors import PromptTooLongError as PromptTooLongError
from ragkv.errors import RagKVError as RagKVError
from ragkv.errors import RecordError as RecordError
from ragkv.errors import StoreError as StoreError
from ragkv.errors import StoreFullError as StoreFullError
from ragkv.errors import UnsupportedModelError as UnsupportedModelError
from ragkv.fusion import Check as Check
from ragkv.layout import Layout as Layout
from ragkv.methods import CacheBlend as CacheBlend
from ragkv.methods import FullPrefill as FullPrefill
from ragkv.methods import LegoLink as LegoLink
from ragkv.methods import Method as Method
from ragkv.methods import Reuse as Reuse
from ragkv.prompt import PromptTemplate as PromptTemplate
from ragkv.rag import RAG as RAG
from ragkv.report import Answer as Answer
from ragkv.report import FusedPrompt as FusedPrompt
from ragkv.report import FusionReport as FusionReport
from ragkv.store import TieredStore as TieredStore

__version__: str
