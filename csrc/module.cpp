// Python's view of the shard engine: olmfast._shards. All copies run without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "combine.hpp"
#include "guard.hpp"
#include "output.hpp"
#include "shard.hpp"
#include "threads.hpp"
#include "transfer.hpp"

namespace py = pybind11;
using namespace olmfast;

namespace {

using Nogil = py::call_guard<py::gil_scoped_release>;

// What waits for threads when it goes.
struct WithoutGil {
  template <typename T>
  void operator()(T* object) const {
    py::gil_scoped_release nogil;
    delete object;
  }
};

// File names are bytes: those that are not UTF-8 come and go as Python's surrogateescape has them.
std::string file_system_path(const py::object& path) {
  return py::module_::import("os").attr("fsencode")(path).cast<py::bytes>();
}
py::object python_path(const std::string& path) {
  return py::module_::import("os").attr("fsdecode")(py::bytes(path));
}

// Memory that Python lends for the length of a call.
class Borrowed {
 public:
  Borrowed(const py::object& object, bool writable) {
    int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
  }
  ~Borrowed() { PyBuffer_Release(&view_); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  void* data() const { return view_.buf; }
  uint64_t size() const { return static_cast<uint64_t>(view_.len); }

 private:
  Py_buffer view_;
};

// Memory that an output will write.
struct Room {
  std::shared_ptr<Stage> stage;
  char* data;
  uint64_t n_bytes;
};

// A buffer over mapped bytes. Python reads it unguarded.
struct View {
  std::shared_ptr<const Mapping> mapping;
  uint64_t offset, n_bytes;
};

Kind kind_of(const std::string& dtype) {
  if (dtype == "BF16") return Kind::bf16;
  if (dtype == "F16") return Kind::f16;
  if (dtype == "F32") return Kind::f32;
  if (dtype == "F64") return Kind::f64;
  switch (dtype_bits(dtype)) {
    case 8: return Kind::bytes1;
    case 16: return Kind::bytes2;
    case 32: return Kind::bytes4;
    case 64: return Kind::bytes8;
    default: throw std::invalid_argument("dtype '" + dtype + "' has no whole number of bytes");
  }
}

Transfer make_transfer(std::shared_ptr<const Shard> shard, uint64_t offset, const std::string& dtype,
                       std::vector<uint64_t> shape, uintptr_t address, uint64_t capacity, const std::string& to_dtype,
                       std::vector<uint64_t> strides) {
  Transfer transfer;
  transfer.shard = std::move(shard);
  transfer.offset = offset;
  transfer.from = kind_of(dtype);
  transfer.to = kind_of(to_dtype);
  transfer.shape = std::move(shape);
  transfer.strides = std::move(strides);
  transfer.address = address;
  transfer.capacity = capacity;
  if (dtype != to_dtype && !(is_float(transfer.from) && is_float(transfer.to))) {
    throw std::invalid_argument(transfer.shard->path() + ": cannot convert " + dtype + " to " + to_dtype +
                                ": only F64, F32, F16 and BF16 are converted");
  }
  transfer.check();
  return transfer;
}

void read_into(const std::shared_ptr<const Shard>& shard, uint64_t offset, const py::object& buffer) {
  Borrowed memory(buffer, true);
  Transfer transfer;
  transfer.shard = shard;
  transfer.offset = offset;
  transfer.shape = {memory.size()};
  transfer.strides = {1};
  transfer.address = reinterpret_cast<uintptr_t>(memory.data());
  transfer.capacity = memory.size();
  transfer.check();
  py::gil_scoped_release nogil;
  run_transfers({transfer});
}

Advice advice_of(const std::string& how) {
  if (how == "prefetch") return Advice::prefetch;
  if (how == "load") return Advice::load;
  if (how == "release") return Advice::release;
  if (how == "drop") return Advice::drop;
  throw std::invalid_argument("advice '" + how + "': expected prefetch, load, release or drop");
}

py::list tensors_of(const Shard& shard) {
  py::list out;
  for (const Entry& entry : shard.header().tensors) {
    out.append(py::make_tuple(entry.name, entry.dtype, py::tuple(py::cast(entry.shape)),
                              shard.data_start() + entry.begin, entry.end - entry.begin));
  }
  return out;
}

py::object metadata_of(const Shard& shard) {
  if (!shard.header().metadata) return py::none();
  py::dict out;
  for (const auto& [key, value] : *shard.header().metadata) out[py::str(key)] = value;
  return std::move(out);
}

void register_errors(py::module_& module) {
  static py::exception<FormatError> format_error(module, "FormatError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const FormatError& error) {
      const std::string text = error.what();  // begins with a file name, which need not be UTF-8
      py::object decoded = py::reinterpret_steal<py::object>(
          PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape"));
      PyErr_SetObject(format_error.ptr(), decoded.ptr());
    } catch (const FileError& error) {
      py::object arguments = py::make_tuple(error.code, error.what(), python_path(error.file));
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });
}

void define_shard(py::module_& module) {
  py::class_<View>(module, "_View", py::buffer_protocol()).def_buffer([](View& view) {
    return py::buffer_info(reinterpret_cast<uint8_t*>(const_cast<char*>(view.mapping->data()) + view.offset),
                           static_cast<py::ssize_t>(view.n_bytes), /*readonly=*/true);
  });
  py::class_<Shard, std::shared_ptr<Shard>>(module, "Shard")
      .def(py::init([](const py::object& path) {
             std::string name = file_system_path(path);
             py::gil_scoped_release nogil;
             return std::make_shared<Shard>(std::move(name));
           }),
           py::arg("path"))
      .def_property_readonly("path", [](const Shard& shard) { return python_path(shard.path()); })
      .def_property_readonly("size", &Shard::size)
      .def_property_readonly("modified_ns", &Shard::modified_ns)
      .def_property_readonly("data_start", &Shard::data_start)
      .def_property_readonly("tensors", &tensors_of)
      .def_property_readonly("metadata", &metadata_of)
      .def_property_readonly("is_mapped", &Shard::is_mapped)
      .def("read_into", &read_into, py::arg("offset"), py::arg("buffer"))
      .def("advise", [](const Shard& shard, uint64_t offset, uint64_t n_bytes, const std::string& how) {
             Advice advice = advice_of(how);
             py::gil_scoped_release nogil;
             shard.advise(offset, n_bytes, advice);
           }, py::arg("offset"), py::arg("n_bytes"), py::arg("how"))
      .def("view", [](const Shard& shard, uint64_t offset, uint64_t n_bytes) {
             shard.check_range(offset, n_bytes);
             return py::memoryview(py::cast(View{shard.mapping(), offset, n_bytes}));
           }, py::arg("offset"), py::arg("n_bytes"))
      .def("check_unchanged", &Shard::check_unchanged, Nogil())
      .def("unmap", &Shard::unmap, Nogil());
}

void define_output(py::module_& module) {
  py::class_<Room>(module, "_Room", py::buffer_protocol()).def_buffer([](Room& room) {
    return py::buffer_info(reinterpret_cast<uint8_t*>(room.data), static_cast<py::ssize_t>(room.n_bytes));
  });
  py::class_<Output>(module, "Output")
      .def(py::init([](const py::object& path, uint64_t n_bytes) {
             std::string name = file_system_path(path);
             py::gil_scoped_release nogil;
             return std::make_unique<Output>(std::move(name), n_bytes);
           }),
           py::arg("path"), py::arg("n_bytes"))
      .def("write", [](Output& output, uint64_t offset, const py::object& buffer) {
             Borrowed memory(buffer, false);
             py::gil_scoped_release nogil;
             output.write(offset, memory.data(), memory.size());
           }, py::arg("offset"), py::arg("buffer"))
      .def("copy", [](Output& output, uint64_t offset, const std::shared_ptr<const Shard>& shard,
                      uint64_t source_offset, uint64_t n_bytes) {
             py::gil_scoped_release nogil;
             return output.copy(offset, *shard, source_offset, n_bytes);
           }, py::arg("offset"), py::arg("shard"), py::arg("source_offset"), py::arg("n_bytes"))
      .def("room", [](Output& output, uint64_t offset, uint64_t n_bytes) {
             char* data;
             {
               py::gil_scoped_release nogil;
               data = output.room(offset, n_bytes);
             }
             return py::memoryview(py::cast(Room{output.stage(), data, n_bytes}));
           }, py::arg("offset"), py::arg("n_bytes"))
      .def_readwrite("_direct", &Output::direct)
      .def_readwrite("_first_method", &Output::first_method)
      .def("finish", &Output::finish, Nogil());
}

void define_combining(py::module_& module) {
  py::class_<Operand>(module, "Operand")
      .def(py::init([](std::shared_ptr<const Shard> shard, uint64_t place, const std::string& dtype,
                       const std::string& rounded, float weight) {
             Operand operand;
             operand.shard = std::move(shard);
             operand.place = place;
             operand.kind = kind_of(dtype);
             operand.rounded = kind_of(rounded);
             operand.weight = weight;
             return operand;
           }),
           py::arg("shard"), py::arg("place"), py::arg("dtype"), py::arg("rounded") = "F32", py::arg("weight") = 1.0f)
      .def_readwrite("weight", &Operand::weight)
      .def_readwrite("from_base", &Operand::from_base)
      .def_readwrite("n_first", &Operand::n_first)
      .def_readwrite("largest_first", &Operand::largest_first)
      .def_readwrite("largest", &Operand::largest)
      .def_readwrite("scale", &Operand::scale);
  py::class_<Target>(module, "Target")
      .def(py::init([](uint64_t n, uintptr_t address, uint64_t capacity, const std::string& dtype,
                       const std::string& rounded) {
             return Target{n, address, capacity, kind_of(dtype), kind_of(rounded)};
           }),
           py::arg("n"), py::arg("address"), py::arg("capacity"), py::arg("dtype"), py::arg("rounded"));
  module.def("combine", &combine, py::arg("operands"), py::arg("divisor"), py::arg("target"), Nogil());
  module.def("combine_task_vectors", [](const Operand& base, const std::vector<Operand>& operands, bool signs,
                                        bool normalize, float divisor, float least, float scale, const Target& target) {
    combine_task_vectors(base, operands, {signs, normalize, divisor, least, scale}, target);
  }, py::arg("base"), py::arg("operands"), py::arg("signs"), py::arg("normalize"), py::arg("divisor"),
     py::arg("least"), py::arg("scale"), py::arg("target"), Nogil());
  module.def("combine_by_row", [](const Operand& moving, const Operand* base, const std::vector<Operand>& operands,
                                  uintptr_t weights, uint64_t n_rows, uint64_t row, uint64_t first,
                                  const Target& target) {
    combine_by_row(moving, base, operands, {weights, n_rows, row, first}, target);
  }, py::arg("moving"), py::arg("base").none(true), py::arg("operands"), py::arg("weights"), py::arg("n_rows"),
     py::arg("row"), py::arg("first"), py::arg("target"), Nogil());
  module.def("count_magnitudes", [](const Operand& operand, const Operand* base, uint64_t n, int32_t low, int32_t high) {
    Counted counted;
    {
      py::gil_scoped_release nogil;
      counted = count_magnitudes(operand, base, n, low, high);
    }
    const auto& tally = counted.tally;
    py::bytearray between(reinterpret_cast<const char*>(counted.between.data()), counted.between.size() * 4);
    return py::make_tuple(tally.above, tally.from_high, tally.over, tally.from_low, between);
  }, py::arg("operand"), py::arg("base").none(true), py::arg("n"), py::arg("low"), py::arg("high"));
  module.def("all_finite", [](uintptr_t address, uint64_t n, const std::string& dtype) {
    return all_finite(address, n, kind_of(dtype));
  }, py::arg("address"), py::arg("n"), py::arg("dtype"), Nogil());
}

}  // namespace

PYBIND11_MODULE(_shards, module) {
  module.doc() = "Bytes of safetensors files: mapped, checked, copied and written, and no idea of what they mean.";
  register_errors(module);
  define_shard(module);
  py::class_<Transfer>(module, "Transfer")
      .def(py::init(&make_transfer), py::arg("shard"), py::arg("offset"), py::arg("dtype"), py::arg("shape"),
           py::arg("address"), py::arg("capacity"), py::arg("to_dtype"), py::arg("strides"))
      .def_property_readonly("n_bytes", &Transfer::n_bytes);
  module.def("copy", &run_transfers, py::arg("transfers"), Nogil());
  py::class_<Filling, std::unique_ptr<Filling, WithoutGil>>(module, "Filling")
      .def(py::init([](size_t n_buffers) { return std::unique_ptr<Filling, WithoutGil>(new Filling(n_buffers)); }),
           py::arg("n_buffers"))
      .def("add", &Filling::add, py::arg("transfers"), Nogil())
      .def("wait", &Filling::wait, Nogil())
      .def("release", &Filling::release)
      .def("close", &Filling::close, Nogil());
  module.def("release_copied", &release_copied, py::arg("on"));
  define_output(module);
  define_combining(module);
  module.attr("ROOM_BYTES") = Output::kRoomBytes;
  module.def("sync_folder", [](const py::object& path) {
    std::string name = file_system_path(path);
    py::gil_scoped_release nogil;
    sync_folder(name);
  }, py::arg("path"));
  module.def("threads", &threads);
  module.def("set_threads", [](size_t n) {
    if (n < 1 || n > 1024) throw std::invalid_argument("threads: expected 1 to 1024, got " + std::to_string(n));
    set_threads(n);
  }, py::arg("n"));
  module.def("_use_portable", &use_portable, py::arg("only"));
  module.def("install_guard", &install_guard);
}
