/* The CUDA entry points that a CuTe DSL object imports, standing in for the runtime.
 *
 * Kernel look-ups and launches go to two callbacks, which the recorder sets; device attributes
 * come from a table, which it fills; everything else succeeds and does nothing.
 */
#include <stddef.h>

int (*sim_on_launch)(void *config, void *kernel, void **arguments);
void *(*sim_on_get_kernel)(const char *name);
int sim_device_attributes[256];

int _cudaLaunchKernelEx(void *config, void *kernel, void **arguments) {
  return sim_on_launch(config, kernel, arguments);
}
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  (void)library;
  *kernel = sim_on_get_kernel(name);
  return 0;
}
int _cudaLibraryLoadData(void **library, ...) {
  if (library) *library = (void *)library;
  return 0;
}
int _cudaGetDevice(int *device) { return *device = 0; }
int _cudaSetDevice(int device) { return (void)device, 0; }
int _cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute >= 0 && attribute < 256 ? sim_device_attributes[attribute] : 0;
  return 0;
}
int _cudaFuncSetAttribute(void *kernel, int attribute, int value) {
  return (void)kernel, (void)attribute, (void)value, 0;
}
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) {
  return (void)kernel, (void)attribute, (void)value, (void)device, 0;
}
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
  (void)attribute, (void)kernel, (void)device;
  *value = 0;
  return 0;
}
void cuda_dialect_init_library_once(void **a, void *b, void *c, void *d, void *e) {
  (void)a, (void)b, (void)c, (void)d, (void)e;
}
void cuda_dialect_unload_library_once(void *a) { (void)a; }
