// SPDX-License-Identifier: GPL-2.0
/*
 * Takes away from the virtio bus what kernels before 6.15 did not have, and what was taken over
 * into the ones that the laboratory boots: that it resets every device on a shutdown. What a
 * driver does there by itself can be seen then. For kernels in which the bus is not constant.
 */
#include <linux/module.h>
#include <linux/virtio.h>

/* Serves no device: only a registered driver knows its bus. */
static const struct virtio_device_id ids[] = { { 0 } };

static int no_probe(struct virtio_device *vdev)
{
	return -ENODEV;
}

static struct virtio_driver driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.id_table = ids,
	.probe = no_probe,
};

static int __init lab_bus_init(void)
{
	struct bus_type *bus;
	int err = register_virtio_driver(&driver);

	if (err)
		return err;
	bus = (struct bus_type *)driver.driver.bus;
	bus->shutdown = NULL;
	unregister_virtio_driver(&driver);
	return 0;
}
module_init(lab_bus_init);

static void __exit lab_bus_exit(void)
{
}
module_exit(lab_bus_exit);

MODULE_DESCRIPTION("Takes the shutdown of the virtio bus away");
MODULE_LICENSE("GPL");
