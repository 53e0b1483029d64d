/* The part of ONNX Runtime's C ABI that the kernels use, written down from its published header
 * (onnxruntime_c_api.h; places checked against ORT_API_VERSION 29, used since version 17).
 *
 * OrtApi is an append-only table of function pointers: a place, once published, never changes.
 * Every type behind a pointer is opaque, so void * stands for it. */
#ifndef LEANGEN_ORT_ABI_H
#define LEANGEN_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_ABI_VERSION = 17 };

enum {
  CreateStatus = 0,
  CreateCustomOpDomain = 26,
  CustomOpDomain_Add = 27,
  AddCustomOpDomain = 28,
  GetTensorMutableData = 51,
  CreateTensorTypeAndShapeInfo = 57,
  SetTensorElementType = 58,
  SetDimensions = 59,
  GetTensorElementType = 60,
  GetDimensionsCount = 61,
  GetDimensions = 62,
  GetSymbolicDimensions = 63,
  GetTensorTypeAndShape = 65,
  KernelInfoGetAttribute_float = 85,
  KernelInfoGetAttribute_int64 = 86,
  KernelInfoGetAttribute_string = 87,
  KernelContext_GetInputCount = 88,
  KernelContext_GetInput = 90,
  KernelContext_GetOutput = 91,
  ReleaseStatus = 93,
  ReleaseTensorTypeAndShapeInfo = 99,
  KernelInfoGetAttributeArray_int64 = 163,
  KernelContext_GetGPUComputeStream = 193,
  KernelInfoGetConstantInput_tensor = 249,
  ShapeInferContext_GetInputTypeShape = 268,
  ShapeInferContext_GetAttribute = 269,
  ShapeInferContext_SetOutputTypeShape = 270,
  SetSymbolicDimensions = 271,
  ReadOpAttr = 272,
  KernelContext_ParallelFor = 274,
};

enum { ORT_INVALID_ARGUMENT = 2 }; /* OrtErrorCode */
enum { ANY_TYPE = 0, TENSOR_FLOAT = 1, TENSOR_UINT8 = 2, TENSOR_INT8 = 3, TENSOR_INT32 = 6,
       TENSOR_INT64 = 7, TENSOR_FLOAT16 = 10 }; /* ONNXTensorElementDataType */
enum { REQUIRED = 0, OPTIONAL = 1, VARIADIC = 2 };        /* of an input or output */
enum { OP_ATTR_INT = 1, OP_ATTR_INTS = 2 };               /* OrtOpAttrType */

typedef void *Status; /* OrtStatus *, NULL is success */

/* OrtCustomOp, as ORT reads it. It calls several of these without looking: none may be NULL. */
typedef struct CustomOp CustomOp;
struct CustomOp {
  uint32_t version;
  void *(*create)(const CustomOp *, const void *api, const void *info);
  const char *(*name)(const CustomOp *);
  const char *(*provider)(const CustomOp *);
  int (*input_type)(const CustomOp *, size_t);
  size_t (*input_count)(const CustomOp *);
  int (*output_type)(const CustomOp *, size_t);
  size_t (*output_count)(const CustomOp *);
  void (*compute)(void *, void *);
  void (*destroy)(void *);
  int (*input_characteristic)(const CustomOp *, size_t);
  int (*output_characteristic)(const CustomOp *, size_t);
  int (*input_memory)(const CustomOp *, size_t);
  int (*variadic_input_min)(const CustomOp *);
  int (*variadic_input_homogeneous)(const CustomOp *);
  int (*variadic_output_min)(const CustomOp *);
  int (*variadic_output_homogeneous)(const CustomOp *);
  Status (*create_v2)(const CustomOp *, const void *api, const void *info, void **kernel);
  Status (*compute_v2)(void *kernel, void *context);
  Status (*infer_shape)(const CustomOp *, void *context);
  int (*start_version)(const CustomOp *);
  int (*end_version)(const CustomOp *);
  size_t (*may_inplace)(int **, int **);
  void (*release_may_inplace)(int *, int *);
  size_t (*alias_map)(int **, int **);
  void (*release_alias_map)(int *, int *);
};

#endif
