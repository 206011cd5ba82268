/* Repeats a call that was seen before: the same kernels with the same numbers, only the addresses are new.

A call's key holds everything but the addresses of its tensors (of these, what they are modulo 16, and which are equal). Whatever the checks,
the plan and the kernels' arguments depend on is therefore equal where keys are equal. What a key was recorded to launch
is kept as finished blocks of kernel parameters, into which a call writes its addresses.

Tensors are read through DLPack's exchange table, which torch hangs on its tensor class. The driver's functions come as
addresses, so that this builds and runs where there is no GPU. All of it runs with Python's lock held. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdalign.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "cuda.h"

enum { MAX_ARGS = 32, MAX_KEY = 1024, MAX_BLOCK = 4096, MAX_PARAMS = 256, MAX_LAUNCHES = 4, MAX_PATCHES = 64, MAX_BUFFERS = 4 };
enum { BY_STREAM = -1 - MAX_BUFFERS };

/* DLPack 1.x: what is read of it. */
typedef struct {
  void *data;
  int32_t device_type, device_index;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  uint32_t major, minor;
  void *previous;
  void *allocate, *export, *import;
  int (*read)(void *object, Tensor *tensor);
} Exchange;

typedef CUresult (*LaunchKernel)(const CUlaunchConfig *, CUfunction, void **, void **);
typedef CUresult (*ReplaceAddress)(CUtensorMap *, void *);
typedef CUresult (*ErrorName)(CUresult, const char **);
typedef CUresult (*IsCapturing)(CUstream, CUstreamCaptureStatus *);

/* ---- Replay: what one key launches ---- */

typedef struct {
  uint32_t offset;  /* in the block of parameters */
  int source;       /* >= 0: the address of that argument; -1 - i: of buffer i; BY_STREAM: of the stream's memory */
  int64_t addend;   /* bytes */
  int map;          /* whether a tensor map begins there, and not an address */
} Patch;

typedef struct {
  CUfunction function;
  unsigned grid_x, grid_y, threads, shared, num_attributes;
  CUlaunchAttribute attributes[2];
  Py_ssize_t size;
  int num_params, num_patches;
  uint16_t offsets[MAX_PARAMS];
  Patch patches[MAX_PATCHES];
  alignas(128) unsigned char block[];
} Launch;

typedef struct {
  PyObject_HEAD
  PyObject *key, *keep;
  PyObject *by_stream; /* {stream: address of the memory that its launches share}, or None where they share none */
  int device;
  int out, lse; /* what is returned: a buffer; or as out argument -1 - out, as lse -1 for None */
  int num_launches, num_buffers;
  PyObject *likes[MAX_BUFFERS]; /* a buffer is allocated like this tensor, which holds no memory */
  Launch *launches[MAX_LAUNCHES];
} Replay;

static void Replay_dealloc(Replay *self) {
  Py_XDECREF(self->key);
  Py_XDECREF(self->keep);
  Py_XDECREF(self->by_stream);
  for (int i = 0; i < self->num_buffers; i++) Py_XDECREF(self->likes[i]);
  for (int i = 0; i < self->num_launches; i++) free(self->launches[i]);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

static int too_many(const char *what) {
  PyErr_Format(PyExc_ValueError, "too many %s", what);
  return -1;
}

/* (function, grid_x, grid_y, threads, shared, dependent, cooperative, block, offsets of parameters, patches) */
static Launch *read_launch(PyObject *spec, int num_buffers, bool by_stream) {
  unsigned long long function;
  unsigned grid_x, grid_y, threads, shared;
  int dependent, cooperative;
  PyObject *block, *offsets, *patches;
  if (!PyArg_ParseTuple(spec, "KIIIIppO!O!O!", &function, &grid_x, &grid_y, &threads, &shared, &dependent, &cooperative,
                        &PyBytes_Type, &block, &PyTuple_Type, &offsets, &PyTuple_Type, &patches))
    return NULL;
  Py_ssize_t size = PyBytes_GET_SIZE(block);
  if (size > MAX_BLOCK || PyTuple_GET_SIZE(offsets) > MAX_PARAMS || PyTuple_GET_SIZE(patches) > MAX_PATCHES) {
    too_many("kernel parameters");
    return NULL;
  }
  Launch *launch = aligned_alloc(128, (sizeof(Launch) + size + 127) / 128 * 128);
  if (!launch) {
    PyErr_NoMemory();
    return NULL;
  }
  memset(launch, 0, sizeof(Launch));
  launch->function = (CUfunction)(uintptr_t)function;
  launch->grid_x = grid_x, launch->grid_y = grid_y, launch->threads = threads, launch->shared = shared;
  if (dependent) {
    CUlaunchAttribute *attribute = &launch->attributes[launch->num_attributes++];
    attribute->id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute->value.programmaticStreamSerializationAllowed = 1;
  }
  if (cooperative) {
    CUlaunchAttribute *attribute = &launch->attributes[launch->num_attributes++];
    attribute->id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    attribute->value.cooperative = 1;
  }
  launch->size = size;
  memcpy(launch->block, PyBytes_AS_STRING(block), size);
  for (; launch->num_params < PyTuple_GET_SIZE(offsets); launch->num_params++) {
    unsigned long offset = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(offsets, launch->num_params));
    if (PyErr_Occurred()) goto wrong;
    if ((Py_ssize_t)offset >= size) goto outside;
    launch->offsets[launch->num_params] = (uint16_t)offset;
  }
  for (; launch->num_patches < PyTuple_GET_SIZE(patches); launch->num_patches++) {
    Patch *patch = &launch->patches[launch->num_patches];
    long long addend;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(patches, launch->num_patches), "IiLp", &patch->offset, &patch->source, &addend, &patch->map))
      goto wrong;
    patch->addend = addend;
    Py_ssize_t needed = patch->map ? (Py_ssize_t)sizeof(CUtensorMap) : (Py_ssize_t)sizeof(uint64_t);
    bool known = patch->source == BY_STREAM ? by_stream && !patch->map : patch->source >= -num_buffers && patch->source < MAX_ARGS;
    if ((Py_ssize_t)patch->offset + needed > size || !known) goto outside;
  }
  return launch;
outside:
  PyErr_SetString(PyExc_ValueError, "outside the kernel's parameters");
wrong:
  free(launch);
  return NULL;
}

/* Replay(key, device, launches, tensors like which buffers are allocated, out, lse, what the key names by identity, by_stream) */
static PyObject *Replay_new(PyTypeObject *type, PyObject *args, PyObject *named) {
  PyObject *key, *launches, *buffers, *keep, *by_stream;
  int device, out, lse;
  if (!PyArg_ParseTuple(args, "O!iO!O!iiOO", &PyBytes_Type, &key, &device, &PyTuple_Type, &launches, &PyTuple_Type, &buffers, &out, &lse, &keep,
                        &by_stream))
    return NULL;
  if (by_stream != Py_None && !PyDict_Check(by_stream)) {
    PyErr_SetString(PyExc_TypeError, "memory by stream is a dict or None");
    return NULL;
  }
  Replay *self = (Replay *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->key = Py_NewRef(key), self->keep = Py_NewRef(keep), self->by_stream = Py_NewRef(by_stream);
  self->device = device, self->out = out, self->lse = lse;
  if (PyTuple_GET_SIZE(buffers) > MAX_BUFFERS || PyTuple_GET_SIZE(launches) > MAX_LAUNCHES) {
    too_many("buffers or launches");
    goto wrong;
  }
  for (; self->num_buffers < PyTuple_GET_SIZE(buffers); self->num_buffers++)
    self->likes[self->num_buffers] = Py_NewRef(PyTuple_GET_ITEM(buffers, self->num_buffers));
  for (; self->num_launches < PyTuple_GET_SIZE(launches); self->num_launches++) {
    self->launches[self->num_launches] = read_launch(PyTuple_GET_ITEM(launches, self->num_launches), self->num_buffers, by_stream != Py_None);
    if (!self->launches[self->num_launches]) goto wrong;
  }
  if (out < -MAX_ARGS - 1 || out >= self->num_buffers || lse < -1 || lse >= self->num_buffers) {
    PyErr_SetString(PyExc_ValueError, "no such buffer");
    goto wrong;
  }
  return (PyObject *)self;
wrong:
  Py_DECREF(self);
  return NULL;
}

static PyTypeObject ReplayType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "flashtile.Replay",
    .tp_basicsize = sizeof(Replay),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Replay(key, device, launches, likes, out, lse, keep, by_stream): the launches of one kind of call.",
    .tp_new = Replay_new,
    .tp_dealloc = (destructor)Replay_dealloc,
};

/* ---- Table: calls by key ---- */

typedef struct {
  PyObject_HEAD
  PyObject *replays;                         /* {hash: Replay} */
  PyObject *tensors, *constants, *listeners; /* classes of tensors; of objects that are told apart by identity; lists */
  PyObject *empty_like, *current_device, *current_stream;
  Exchange *exchange;
  LaunchKernel launch;
  ReplaceAddress replace;
  ErrorName error_name;
  IsCapturing is_capturing;
} Table;

static void Table_dealloc(Table *self) {
  Py_XDECREF(self->replays);
  Py_XDECREF(self->tensors);
  Py_XDECREF(self->constants);
  Py_XDECREF(self->listeners);
  Py_XDECREF(self->empty_like);
  Py_XDECREF(self->current_device);
  Py_XDECREF(self->current_stream);
  Py_TYPE(self)->tp_free((PyObject *)self);
}

/* Table(exchange, tensor classes, constant classes, lists that must be empty, empty_like, current_device, current_stream, driver) */
static PyObject *Table_new(PyTypeObject *type, PyObject *args, PyObject *named) {
  PyObject *capsule, *tensors, *constants, *listeners, *empty_like, *current_device, *current_stream;
  unsigned long long launch, replace, error_name, is_capturing;
  if (!PyArg_ParseTuple(args, "OO!O!O!OOO(KKKK)", &capsule, &PyTuple_Type, &tensors, &PyTuple_Type, &constants, &PyTuple_Type, &listeners,
                        &empty_like, &current_device, &current_stream, &launch, &replace, &error_name, &is_capturing))
    return NULL;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(listeners); i++)
    if (!PyList_Check(PyTuple_GET_ITEM(listeners, i))) {
      PyErr_SetString(PyExc_TypeError, "listeners are lists");
      return NULL;
    }
  Exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (!exchange) return NULL;
  if (exchange->major != 1 || !exchange->read || !launch || !error_name || !is_capturing) {
    PyErr_SetString(PyExc_ValueError, "an exchange table of DLPack 1, and the driver's functions");
    return NULL;
  }
  Table *self = (Table *)type->tp_alloc(type, 0);
  if (!self) return NULL;
  self->tensors = Py_NewRef(tensors), self->constants = Py_NewRef(constants), self->listeners = Py_NewRef(listeners);
  self->empty_like = Py_NewRef(empty_like), self->current_device = Py_NewRef(current_device), self->current_stream = Py_NewRef(current_stream);
  self->exchange = exchange;
  self->launch = (LaunchKernel)(uintptr_t)launch;
  self->replace = (ReplaceAddress)(uintptr_t)replace;
  self->error_name = (ErrorName)(uintptr_t)error_name;
  self->is_capturing = (IsCapturing)(uintptr_t)is_capturing;
  self->replays = PyDict_New();
  if (!self->replays) {
    Py_DECREF(self);
    return NULL;
  }
  return (PyObject *)self;
}

typedef struct {
  uint64_t words[MAX_KEY];
  int count;
  void *addresses[MAX_ARGS];
} Key;

static inline bool is_one_of(PyObject *object, PyObject *types) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types); i++)
    if ((PyObject *)Py_TYPE(object) == PyTuple_GET_ITEM(types, i)) return true;
  return false;
}

/* Adds one argument to the key; false where it cannot be keyed, with no error set. ``address`` is a tensor's. */
static bool add_to_key(Table *self, Key *key, PyObject *arg, void **address) {
  if (key->count + 32 > MAX_KEY) return false;
  uint64_t *word = key->words + key->count;
  if (arg == Py_None || arg == Py_True || arg == Py_False) {
    *word = arg == Py_None ? 1 : arg == Py_True ? 2 : 3;
    key->count++;
    return true;
  }
  if (PyFloat_CheckExact(arg)) {
    double value = PyFloat_AS_DOUBLE(arg);
    word[0] = 4;
    memcpy(word + 1, &value, sizeof(value));
    key->count += 2;
    return true;
  }
  if (PyLong_CheckExact(arg)) {
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(arg, &overflow);
    word[0] = 5, word[1] = (uint64_t)value;
    key->count += 2;
    return !overflow;
  }
  if (address && is_one_of(arg, self->tensors)) {
    Tensor tensor;
    if (self->exchange->read(arg, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    int ndim = tensor.ndim;
    if (ndim > 8 || !tensor.strides) return false;
    uint64_t data = (uint64_t)tensor.data + tensor.byte_offset;
    *address = (void *)data;
    word[0] = 6 | (uint64_t)ndim << 8 | (uint64_t)(data & 15) << 16 | (uint64_t)tensor.code << 24 | (uint64_t)tensor.bits << 32 | (uint64_t)tensor.lanes << 40;
    word[1] = (uint64_t)(uint32_t)tensor.device_type << 32 | (uint32_t)tensor.device_index;
    memcpy(word + 2, tensor.shape, ndim * sizeof(int64_t));
    memcpy(word + 2 + ndim, tensor.strides, ndim * sizeof(int64_t));
    key->count += 2 + 2 * ndim;
    return true;
  }
  if (address && PyTuple_CheckExact(arg)) {
    word[0] = 7 | (uint64_t)PyTuple_GET_SIZE(arg) << 8;
    key->count++;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arg); i++)
      if (!add_to_key(self, key, PyTuple_GET_ITEM(arg, i), NULL)) return false;
    return true;
  }
  if (is_one_of(arg, self->constants)) {
    word[0] = 8, word[1] = (uint64_t)(uintptr_t)arg;
    key->count += 2;
    return true;
  }
  return false;
}

static bool make_key(Table *self, Key *key, PyObject *const *args, Py_ssize_t count) {
  key->count = 0;
  if (count > MAX_ARGS) return false;
  for (Py_ssize_t i = 0; i < count; i++) {
    uint64_t *word = key->words + key->count;
    key->addresses[i] = NULL;
    if (!add_to_key(self, key, args[i], &key->addresses[i])) return false;
    /* which tensors begin at one address is part of the key: then it does not matter to which of them a pointer is traced */
    for (Py_ssize_t j = 0; key->addresses[i] && j < i; j++)
      if (key->addresses[j] == key->addresses[i]) {
        *word |= (uint64_t)(j + 1) << 56;
        break;
      }
  }
  return true;
}

/* A few calls are told apart by a whole word; two that share it are told apart by their bytes. */
static PyObject *hash_of(const uint64_t *words, Py_ssize_t count) {
  uint64_t hash = 0x9E3779B97F4A7C15u ^ (uint64_t)count;
  for (Py_ssize_t i = 0; i < count; i++) {
    hash = (hash ^ words[i]) * 0xD6E8FEB86659FD93u;
    hash ^= hash >> 32;
  }
  return PyLong_FromUnsignedLongLong(hash >> 1);
}

static PyObject *Table_key(Table *self, PyObject *const *args, Py_ssize_t count) {
  Key key;
  if (!make_key(self, &key, args, count)) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize((char *)key.words, key.count * sizeof(uint64_t));
}

static PyObject *Table_add(Table *self, PyObject *replay) {
  if (!Py_IS_TYPE(replay, &ReplayType)) {
    PyErr_SetString(PyExc_TypeError, "a Replay");
    return NULL;
  }
  PyObject *key = ((Replay *)replay)->key;
  PyObject *hash = hash_of((uint64_t *)PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key) / sizeof(uint64_t));
  if (!hash) return NULL;
  int failed = PyDict_SetItem(self->replays, hash, replay);
  Py_DECREF(hash);
  if (failed) return NULL;
  Py_RETURN_NONE;
}

static PyObject *Table_clear(Table *self, PyObject *unused) {
  PyDict_Clear(self->replays);
  Py_RETURN_NONE;
}

static Py_ssize_t Table_length(Table *self) { return PyDict_GET_SIZE(self->replays); }

static Replay *find(Table *self, const Key *key) {
  PyObject *hash = hash_of(key->words, key->count);
  if (!hash) return NULL;
  Replay *replay = (Replay *)PyDict_GetItemWithError(self->replays, hash);
  Py_DECREF(hash);
  if (!replay) return NULL;
  Py_ssize_t size = key->count * sizeof(uint64_t);
  if (PyBytes_GET_SIZE(replay->key) != size || memcmp(PyBytes_AS_STRING(replay->key), key->words, size)) return NULL;
  return replay;
}

/* Where the patch's memory begins. */
static char *start_of(const Patch *patch, const Key *key, void *const *buffers, void *shared) {
  if (patch->source >= 0) return key->addresses[patch->source];
  return patch->source == BY_STREAM ? shared : buffers[-1 - patch->source];
}

static CUresult launch_one(const Table *self, const Launch *launch, const Key *key, void *const *buffers, void *shared, CUstream stream) {
  alignas(128) unsigned char block[MAX_BLOCK];
  void *params[MAX_PARAMS];
  memcpy(block, launch->block, launch->size);
  for (int i = 0; i < launch->num_params; i++) params[i] = block + launch->offsets[i];
  for (int i = 0; i < launch->num_patches; i++) {
    const Patch *patch = &launch->patches[i];
    char *address = start_of(patch, key, buffers, shared) + patch->addend;
    if (patch->map) {
      CUresult result = self->replace((CUtensorMap *)(block + patch->offset), address);
      if (result != CUDA_SUCCESS) return result;
    } else {
      memcpy(block + patch->offset, &address, sizeof(address));
    }
  }
  CUlaunchConfig config = {
      .gridDimX = launch->grid_x, .gridDimY = launch->grid_y, .gridDimZ = 1,
      .blockDimX = launch->threads, .blockDimY = 1, .blockDimZ = 1,
      .sharedMemBytes = launch->shared, .hStream = stream,
      .attrs = (CUlaunchAttribute *)launch->attributes, .numAttrs = launch->num_attributes,
  };
  return self->launch(&config, launch->function, params, NULL);
}

/* 0 and the number; -1 with an error set */
static int call_for_number(PyObject *function, PyObject *argument, unsigned long long *number) {
  PyObject *result = argument ? PyObject_CallOneArg(function, argument) : PyObject_CallNoArgs(function);
  if (!result) return -1;
  *number = PyLong_AsUnsignedLongLong(result);
  Py_DECREF(result);
  return PyErr_Occurred() ? -1 : 0;
}

/* The memory that launches of a stream share; NULL where it has none yet, or is captured into a graph, which gets its own. */
static void *memory_of(const Table *self, const Replay *replay, CUstream stream) {
  CUstreamCaptureStatus status;
  if (self->is_capturing(stream, &status) != CUDA_SUCCESS || status != CU_STREAM_CAPTURE_STATUS_NONE) return NULL;
  PyObject *number = PyLong_FromUnsignedLongLong((uintptr_t)stream);
  if (!number) return NULL;
  PyObject *address = PyDict_GetItemWithError(replay->by_stream, number);
  Py_DECREF(number);
  return address ? PyLong_AsVoidPtr(address) : NULL;
}

/* run(*args): (out, lse) of a call that was recorded, and None of any other. Nothing has happened where it is None. */
static PyObject *Table_run(Table *self, PyObject *const *args, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->listeners); i++)
    if (PyList_GET_SIZE(PyTuple_GET_ITEM(self->listeners, i))) Py_RETURN_NONE;
  Key key;
  if (!make_key(self, &key, args, count)) Py_RETURN_NONE;
  Replay *replay = find(self, &key);
  if (!replay) {
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
  }
  Py_INCREF(replay); /* allocating may run other Python, which may clear the table */
  PyObject *tensors[MAX_BUFFERS] = {NULL};
  void *buffers[MAX_BUFFERS] = {NULL}, *shared = NULL;
  PyObject *result = NULL;
  unsigned long long device, stream;
  if (call_for_number(self->current_device, NULL, &device) < 0) goto done;
  if ((int)device != replay->device) goto miss;
  PyObject *index = PyLong_FromLong(replay->device);
  if (!index) goto done;
  int failed = call_for_number(self->current_stream, index, &stream);
  Py_DECREF(index);
  if (failed) goto done;
  if (replay->by_stream != Py_None && !(shared = memory_of(self, replay, (CUstream)(uintptr_t)stream))) {
    if (PyErr_Occurred()) goto done;
    goto miss;
  }
  for (int i = 0; i < replay->num_buffers; i++) {
    Tensor tensor;
    if (!(tensors[i] = PyObject_CallOneArg(self->empty_like, replay->likes[i]))) goto done;
    if (self->exchange->read(tensors[i], &tensor) != 0) goto done;
    buffers[i] = (char *)tensor.data + tensor.byte_offset;
  }
  for (int i = 0; i < replay->num_launches; i++) {
    CUresult code = launch_one(self, replay->launches[i], &key, buffers, shared, (CUstream)(uintptr_t)stream);
    if (code == CUDA_SUCCESS) continue;
    if (i == 0 && code == CUDA_ERROR_INVALID_CONTEXT) goto miss; /* a thread's first work: the longer way makes its context */
    const char *name = NULL;
    self->error_name(code, &name);
    PyErr_Format(PyExc_RuntimeError, "CUDA could not launch a kernel: %s (%d)", name ? name : "unknown error", (int)code);
    goto done;
  }
  PyObject *out = replay->out >= 0 ? tensors[replay->out] : args[-1 - replay->out];
  result = PyTuple_Pack(2, out, replay->lse >= 0 ? tensors[replay->lse] : Py_None);
  goto done;
miss:
  result = Py_NewRef(Py_None);
done:
  for (int i = 0; i < replay->num_buffers; i++) Py_XDECREF(tensors[i]);
  Py_DECREF(replay);
  return result;
}

static PyMethodDef table_methods[] = {
    {"run", (PyCFunction)(void (*)(void))Table_run, METH_FASTCALL, "(out, lse) of a call that was recorded, None of any other."},
    {"key", (PyCFunction)(void (*)(void))Table_key, METH_FASTCALL, "A call's key, or None where an argument has none."},
    {"add", (PyCFunction)Table_add, METH_O, "Takes a Replay up, in the place of one with its key."},
    {"clear", (PyCFunction)Table_clear, METH_NOARGS, "Forgets all."},
    {NULL, NULL, 0, NULL},
};

static PySequenceMethods table_as_sequence = {.sq_length = (lenfunc)Table_length};

static PyTypeObject TableType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "flashtile.Table",
    .tp_basicsize = sizeof(Table),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Table(exchange, tensors, constants, listeners, empty_like, current_device, current_stream, driver): recorded calls by key.",
    .tp_new = Table_new,
    .tp_dealloc = (destructor)Table_dealloc,
    .tp_methods = table_methods,
    .tp_as_sequence = &table_as_sequence,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "flashtile_replay", "Repeats calls that were recorded.", -1, NULL};

PyMODINIT_FUNC PyInit_flashtile_replay(void) {
  if (PyType_Ready(&ReplayType) < 0 || PyType_Ready(&TableType) < 0) return NULL;
  PyObject *made = PyModule_Create(&module);
  if (!made) return NULL;
  if (PyModule_AddObjectRef(made, "Replay", (PyObject *)&ReplayType) < 0 || PyModule_AddObjectRef(made, "Table", (PyObject *)&TableType) < 0) {
    Py_DECREF(made);
    return NULL;
  }
  return made;
}
